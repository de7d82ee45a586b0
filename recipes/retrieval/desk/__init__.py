"""The page desk: a policy searches a store, opens pages, zooms in, and answers."""
