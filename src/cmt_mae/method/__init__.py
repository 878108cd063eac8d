"""The paper: everything here is a pure function of tensors or a torch module. Imports torch and timm only."""
