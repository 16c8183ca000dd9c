"""The seam: Prefect flows and tasks, settings, steps and the command line.

`flows` joins `blip_core` (models) and `storage` (the lake), and is the only package that knows
Prefect. Steps in `flows.steps` are plain functions; `flows.tasks` turns them into tasks.
"""
