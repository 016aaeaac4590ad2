"""Model folders made of model folders: subsets taken out, and written back."""
