"""Claim and hold jobs under fenced leases, and name the processes that hold them."""
