"""The mixers of a layer, one file each: attention, short convolution, gated delta rule, Mamba-2, MLP, mixture of experts."""
