"""Who works what: claims on jobs under leases with fences, and the names of those who hold them."""
