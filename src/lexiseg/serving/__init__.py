"""`lexiseg serve`: a registered model over HTTP. MLflow's scoring server answers, behind limits of our own."""
