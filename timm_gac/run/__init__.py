"""`python -m timm_gac.run SCRIPT ...` runs a script of timm with the models of this package registered."""
