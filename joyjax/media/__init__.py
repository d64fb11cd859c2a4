"""Pictures: reading, fitting, masks, and the formats and metadata of files."""
