"""From a decomposed model to one as good as its teacher."""
