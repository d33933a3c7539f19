"""From machines to a Dask cluster, on the caller's side."""
