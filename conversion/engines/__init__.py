"""EMO models written as models that other engines know: vLLM, llama.cpp, MLX, SGLang, plain Transformers."""
