"""x"""
def write_page(record, page): pass
