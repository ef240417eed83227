"""How many threads BLAS uses: the environment says it before NumPy is loaded; later is too late."""

THREAD_VARIABLES = (  # of OpenMP, OpenBLAS, MKL, Accelerate and BLIS
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
)
ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")
