"""Teachers stored as their k likeliest tokens: computing, storing and reading them in batches."""

from fastkd.teachers._collate import collate
from fastkd.teachers._fingerprint import fingerprint
from fastkd.teachers._store import TeacherStore
from fastkd.teachers._teacher_topk import TopK, teacher_topk

__all__ = ["TeacherStore", "TopK", "collate", "fingerprint", "teacher_topk"]
