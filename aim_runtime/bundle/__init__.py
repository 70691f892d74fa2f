"""The bundle's format: its manifest, its files, and how both are read and written."""

from aim_runtime.bundle.bundle import Bundle, models_dir
from aim_runtime.bundle.writing import add_engine, add_files, check_target, write_bundle

__all__ = ["Bundle", "add_engine", "add_files", "check_target", "models_dir", "write_bundle"]
