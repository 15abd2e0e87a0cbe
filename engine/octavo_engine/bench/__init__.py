"""`octavo bench`: how fast a server or an engine is. Prints the labels and writes the JSON keys of `vllm bench`."""
