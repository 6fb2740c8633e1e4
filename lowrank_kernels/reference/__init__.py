"""The operators in plain torch: the oracle of every test, the ``torch`` backend, and the CPU path."""
