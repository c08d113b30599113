"""What every room may use: files, name patterns, progress, optional imports.

Nothing here knows of weights, audio or models, and nothing here imports
torch or speechbrain.

Authors
 * speechbrain_taskarith contributors 2026
"""
