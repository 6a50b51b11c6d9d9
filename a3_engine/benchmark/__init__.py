"""How long requests take, what they need at least, and what other machines would make of them."""
