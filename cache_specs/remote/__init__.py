"""A cache that lies elsewhere: a bucket of an object store, or a data set of the Hugging Face hub."""
