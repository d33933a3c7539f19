"""What runs inside the Dask scheduler: plugins, and the dashboard's page of skyward."""
