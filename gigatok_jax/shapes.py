"""The dimension letters that suffix array names (`x_BND`), and nothing else.

B  batch            H, W  height, width of an image or feature map   C  channels
K  latent tokens    N     tokens of a sequence (grid or memory)      D  width of a transformer
Z  code dimension   V     codebook entries                           F  hidden width of an MLP
T  text tokens      L     stacked layers                             Q  queries
G  heads            E     dimension of one head                      M  features of a frozen teacher
"""
