"""The compiled kernels, and what must be set before they are loaded."""

import os

# How often an idle OpenMP thread looks for work before it sleeps: 10000 times take about 150 us. With libgomp's own
# count two trainings of LeNet-5 on the same two cores took 65 and 179 ms a step; with 1000, 3000 and 10000 they take
# 5.4 to 6.2, and one alone 2.2, 2.6 and 1.6. A choice of the user's stands.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"
