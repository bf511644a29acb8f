"""STEGO: unsupervised segmentation by distilling feature correspondences (Hamilton et al., ICLR 2022)."""
