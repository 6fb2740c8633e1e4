"""A saved model behind HTTP, on FastAPI and uvicorn."""
