"""Run SQL queries against the store in a sandbox, and provide saved queries."""
