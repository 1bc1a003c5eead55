import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: train.py says why
