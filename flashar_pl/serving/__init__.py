"""Images over HTTP: what may be asked, who draws it, and the application that answers."""
