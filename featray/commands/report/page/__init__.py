"""Turn the numbers of a report into one HTML file, one JSON document and Arrow tables.

`model.py` defines the content, `page.py` writes the HTML, `data.py` the JSON and the tables. Modules of this
package must know no storage and compute no measure.
"""
