"""Beam pipelines around `clapsep`: manifests in, stems and tables out."""
