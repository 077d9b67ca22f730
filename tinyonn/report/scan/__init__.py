"""Pages and figures of scans."""
