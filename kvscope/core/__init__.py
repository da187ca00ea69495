"""What every room may know: errors, budgets, options, records, output folders, registries. No torch."""
