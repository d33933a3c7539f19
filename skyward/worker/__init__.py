"""What runs inside a worker process. Imports only facts, and Dask where a worker has loaded it."""
