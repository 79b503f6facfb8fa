"""Teachers stored as their k likeliest tokens: computing them, and storing them on disk."""

from fastkd.teachers._fingerprint import fingerprint
from fastkd.teachers._store import TeacherStore
from fastkd.teachers._teacher_topk import TopK, teacher_topk

__all__ = ["TeacherStore", "TopK", "fingerprint", "teacher_topk"]
