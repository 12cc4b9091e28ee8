"""Servers that tests start on 127.0.0.1: object stores, and a proxy that injects faults."""
