"""Training and scoring with mmengine's runner."""
