"""Visual retrieval: documents become page images, pages become vectors, a question finds its pages."""
