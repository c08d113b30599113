"""What the studies of Whisper share: lines, models, rows, reports."""
