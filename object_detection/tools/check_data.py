def check_datasets(config):
    pass
