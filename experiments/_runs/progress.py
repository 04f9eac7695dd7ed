"""The progress bar of the runs."""

# From here, because `experiments._runs` first checks that tqdm is installed.
from tqdm import tqdm as tqdm
