"""A³ in LlamaIndex and LangChain; each framework is imported only by its own subpackage."""
