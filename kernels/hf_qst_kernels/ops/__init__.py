"""One op a file, named after it, and its Triton kernels in a second file. Importing the first registers its operators."""
