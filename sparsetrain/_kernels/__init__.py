"""The compiled kernels, and what must be set before they are loaded."""

import os

# How often an idle OpenMP thread looks for work before it sleeps. With libgomp's own count two trainings of LeNet-5
# on the same two cores took 65 and 179 ms a step instead of 1.2, with 1000 5 ms, with 3000 9 ms; alone, a step takes as
# long as with libgomp's count (1000: 10 % longer). A choice of the user's stands.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"
