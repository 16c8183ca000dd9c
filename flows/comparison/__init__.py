"""Policies side by side: what models trained on each one's texts reach, and how sure that is."""
