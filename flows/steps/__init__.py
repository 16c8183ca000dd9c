"""Steps: plain functions on one shard or one model, called by tasks and by tests alike."""
