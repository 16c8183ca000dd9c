"""Pictures that somebody has already: tars, Parquet files, folders and captions files, taken in as they are."""
