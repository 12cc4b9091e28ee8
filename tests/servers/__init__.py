"""Servers that tests start on 127.0.0.1: a real object store, and a proxy that makes it misbehave."""
