"""TCL: text-grounded contrastive learning from captions alone (Cha, Mun and Roh, CVPR 2023)."""
