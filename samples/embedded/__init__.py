"""Makes the models that ship in the package: drawings, training, evaluation, export."""
