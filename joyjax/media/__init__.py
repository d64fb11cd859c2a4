"""Pictures as files: formats, and the texts that they carry."""
