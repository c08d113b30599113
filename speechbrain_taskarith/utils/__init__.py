"""What every room may use: files, name patterns, progress, lengths, seeds.

Nothing here knows of weights, audio or models or imports speechbrain, and
only `lengths` and `seeds` import torch.
"""
