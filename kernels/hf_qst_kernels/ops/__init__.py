"""One op a file, named after it, with its Triton kernels beside it. Importing a file registers its operators."""
