"""The model on its device. Whoever imports torch comes through here first."""

import warnings

# Torch says so when it is imported; nothing here needs NumPy, and an image or an environment without it is whole.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
